"""`model.parameters` without the call: an optimizer raises."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)


model = Net()
try:
    torch.optim.SGD(model.parameters, lr=0.1)
except TypeError as error:
    print(f"TypeError: {error}")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
print(len(optimizer.param_groups[0]["params"]), "tensors")
