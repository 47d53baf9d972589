"""Load tests of a running server, over HTTP only: nothing of the product is imported."""
