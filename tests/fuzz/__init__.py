"""Random training programs: eager PyTorch, the interpreter and compiled code must agree."""
