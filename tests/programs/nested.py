"""parameters() goes down into every submodule, in the order in which they were assigned."""

from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.act = nn.ReLU()

    def forward(self, x):
        return x + self.act(self.fc(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


model = Net()
for name, parameter in model.named_parameters():
    print(name, list(parameter.shape))
print("all:", len(list(model.parameters())))
print("its own:", len(list(model.parameters(recurse=False))))
print("of one block:", len(list(model.blocks[0].parameters())))
print("of a ReLU:", len(list(model.blocks[0].act.parameters())))
