"""A convolutional network that flattens with view: which of its operations have parameters?"""

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.conv2 = nn.Conv2d(4, 8, 3)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(8 * 2 * 2, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(x.size(0), -1)
        return self.fc(x)


model = Net()
print(model(torch.zeros(6, 1, 8, 8)).shape)
total = 0
for name, parameter in model.named_parameters():
    print(f"{name:<13}{str(tuple(parameter.shape)):<14}{parameter.numel():>4}")
    total += parameter.numel()
print("total", total)
