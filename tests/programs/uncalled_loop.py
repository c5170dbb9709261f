"""`model.parameters` without the call: a loop over it, its length, and an item."""

from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)


def attempt(what, use):
    try:
        print(f"{what}: {use()}")
    except TypeError as error:
        print(f"{what}: TypeError: {error}")


model = Net()
attempt("uncalled, a loop", lambda: [item for item in model.parameters])
attempt("uncalled, len", lambda: len(model.parameters))
attempt("uncalled, by name", lambda: tuple(model.parameters["fc.weight"].shape))
attempt("called, a loop", lambda: [tuple(item.shape) for item in model.parameters()])
attempt("called, len", lambda: len(model.parameters()))
attempt("called, by index", lambda: model.parameters()[0])
