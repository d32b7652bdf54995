"""The workshop: what any program needs, so that the files above hold nothing but the paper.
Each file says in its first line what it holds.
"""
