"""An nn.Sequential whose first layer is frozen; parameters() still yields it."""

import torch
from torch import nn

model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
for parameter in model.parameters():
    nn.init.constant_(parameter, 0.5)
for parameter in model[0].parameters():
    parameter.requires_grad = False

print("all:", [tuple(p.shape) for p in model.parameters()])
print("trainable:", [tuple(p.shape) for p in model.parameters() if p.requires_grad])

before = [p.clone() for p in model.parameters()]
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
model(torch.ones(5, 4)).sum().backward()
optimizer.step()
for (name, after), old in zip(model.named_parameters(), before):
    print(f"{name}: gradient {after.grad is not None}, moved {not torch.equal(after, old)}")
