"""What print shows for the method, the iterator, a parameter, and its values."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)


model = Net()
with torch.no_grad():
    model.fc.weight.copy_(torch.tensor([[1.0, -2.0]]))
    model.fc.bias.fill_(0.25)
print(str(model.parameters).splitlines()[0])
print(str(model.parameters()).split(" at ")[0] + ">")
print(model.fc.weight)
print(model.fc.weight.data)
print(model.fc.weight.detach().numpy())
print(model.fc.bias.item())
