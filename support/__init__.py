"""The workshop: what any program needs, so that the files above hold nothing but the paper.

config      every setting, once: default, check and help; the command lines are built from it
checkpoint  a run and what is kept of it: save, load, resume, published weights
images      images in, pictures out; the one place where bytes become pixels
devices     the device, its precision, and the processes that share the work
console     what a user sees: progress, errors, the loss as a chart
"""
