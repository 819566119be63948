"""Public functions of each kernel family, with their fakes and autograd."""
