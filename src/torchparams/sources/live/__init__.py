"""Live `nn.Module`s: parameters, buffers, hidden tensors, and the Python expressions for them."""
