"""Names and shapes, four ways that give the same tensors."""

from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.fc2 = nn.Linear(3, 2)


model = Net()
for name, parameter in model.named_parameters():
    print(f"{name}: {parameter.shape}")
print(list(dict(model.named_parameters())) == [name for name, _ in model.named_parameters()])
print([id(p) for p in model.parameters()] == [id(p) for _, p in model.named_parameters()])
print("only in the state_dict:", [name for name in model.state_dict() if name not in dict(model.named_parameters())])
print("buffers:", [name for name, _ in model.named_buffers()])
