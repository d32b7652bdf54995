"""The workshop: what any program needs, so that the files above hold nothing but the paper.

config      every setting, once: default, check and help; the command lines are built from it
run         a training run: begun, saved, stopped, gone on with exactly
checkpoint  networks in files: our own, and those that others have published
drawing     many images at once: their noise, their labels, what is kept of them
images      images in, pictures out; the one place where bytes become pixels
devices     the device, its precision, and the processes that share the work
console     what a user sees: progress, errors, the loss as a chart
"""
