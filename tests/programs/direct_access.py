"""One parameter by attributes and indices, by name, and replaced."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.body(x) * self.scale


model = Net()
weight = model.body[2].weight
print(
    weight.shape,
    weight is model.get_parameter("body.2.weight"),
    weight is dict(model.named_parameters())["body.2.weight"],
)
print(weight is list(model.parameters())[3], [name for name, _ in model.named_parameters()][3])
print(model.scale)

with torch.no_grad():
    weight[0, 0] = 7.0
print(model.state_dict()["body.2.weight"][0, 0].item())

model.body[2] = nn.Linear(3, 5)
print(model.get_parameter("body.2.weight").shape, weight is model.body[2].weight)
try:
    model.body[1].weight
except AttributeError as error:
    print(f"AttributeError: {error}")
