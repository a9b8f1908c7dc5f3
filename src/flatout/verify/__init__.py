"""Is the optimised model faster on this machine, and is its loss inside the budget?"""
