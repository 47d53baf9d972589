"""``matgptq tune``: measure which configurations this GPU runs fastest, and write them to a table."""
