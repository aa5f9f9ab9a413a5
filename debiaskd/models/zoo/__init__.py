"""Networks that come with debiaskd: small, of the distillation papers on CIFAR, and without biases."""
