"""Model families as plain PyTorch: the specification every runner is compared with. Loads PyTorch on use."""
