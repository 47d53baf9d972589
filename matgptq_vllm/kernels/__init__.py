"""Matrix products that read a slice of a parent. torch and triton only; vLLM never appears here."""
