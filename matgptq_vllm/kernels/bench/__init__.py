"""Time per matrix product, ours against cuBLAS, Marlin and Machete: python -m matgptq_vllm.kernels.bench --peers"""
