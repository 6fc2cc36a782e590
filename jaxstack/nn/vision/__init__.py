"""Networks for images in flax linen, NHWC: classes and channels are arguments, any image size, no weights built in.

`__call__(x [N, H, W, C] float, train=False, *, taps=False)` -> logits [N, classes], with `taps` also a tuple of what
the stages give. `zoo.network` makes one from its name, `folding.fold_batchnorm` one without BatchNorm
where it can be folded, for inference.
"""
