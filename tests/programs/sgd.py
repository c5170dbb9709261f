"""Gradient descent on model.parameters(): a line through points."""

import torch
from torch import nn


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)

    def forward(self, x):
        return self.fc(x)


model = Line()
nn.init.zeros_(model.fc.weight)
nn.init.zeros_(model.fc.bias)
x = torch.linspace(-1, 1, 9).unsqueeze(1)
y = 3 * x + 0.5
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(60):
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:>2}  loss {loss.item():.4f}")
for name, parameter in model.named_parameters():
    print(f"{name} = {parameter.item():.3f}")
