"""A live `nn.Module`: its parameters and buffers, what it hides, and how Python reaches them."""
