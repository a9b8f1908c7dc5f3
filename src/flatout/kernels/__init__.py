"""Ops: a contract and a plain PyTorch reference each, with fast versions beside them. Nothing loads until
asked for."""
