"""Zeroing the parameters is not zeroing the gradients."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(3, 4)
        self.fc2 = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


model = Net()
model(torch.ones(2, 3)).sum().backward()
model.zero_grad()
print("after zero_grad:", [p.grad for p in model.parameters()], "- weights left:", bool(model.fc2.weight.any()))

with torch.no_grad():
    for parameter in model.parameters():
        parameter.zero_()
print("after zero_: the model gives", model(torch.ones(2, 3)).flatten().tolist())
model(torch.ones(2, 3)).sum().backward()
for name, parameter in model.named_parameters():
    print(f"{name}: gradient {parameter.grad.abs().sum().item()}")
