"""Every parameter filled with one value: the output can be computed by hand, and the units stay equal for ever."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(10, 3)
        self.out = nn.Linear(3, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(x)))


model = Net()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(0.5)
print(model.hidden.weight[0])
print(model.hidden(torch.ones(1, 10)))

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.linspace(-1, 1, 40).view(4, 10)
for _ in range(100):
    optimizer.zero_grad()
    (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()
rows = model.hidden.weight
print("moved:", bool((rows != 0.5).any()), "- equal to one another:", torch.allclose(rows[0], rows[1]))
