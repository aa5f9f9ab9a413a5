"""Networks that come with debiaskd: small ones, those of the CIFAR distillation papers, and bias-free ones."""
