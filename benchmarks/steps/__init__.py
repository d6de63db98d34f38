"""The parts of `cpu_step.py`: contenders in processes of their own, roofline, results, tables."""
