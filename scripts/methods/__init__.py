"""One file per adapter method: its fixture cases and, where PEFT does not have the method, a reference written from the paper.

A file holds

    CASES   name of the fixture -> dict of
              config     adapter_config.json as a user would write it, with `peft_type`
              run        changes to the settings of a run (see DEFAULTS in make_train_fixtures.py), `steps` is 5
              matters    [(what, changed config, changed run)]: what must change the losses by 100 x the tolerance
              noise      standard deviation of what is added to every trained tensor before the fixture is written (0.1)
              initial    "same" (a new adapter leaves the model as it is; the default), "random" (it does not, on purpose), or
                         "prepared" (base weight and delta of a new adapter are compared)
              spans      ending in the file -> buffer: tensors of a new adapter that are compared by what they span
              spans_alone    True: signs of singular vectors decide the base and the delta of a new adapter, so that these are not compared
              keeps_initial  True: the new adapter is written into start/initial_adapter
              own_keys   keys of the configuration that PEFT does not know
              merges     False where no single weight can take the adapter's place
              build      build(model, config, rows) -> adapted model, where PEFT needs more than its configuration
              hooks      hooks(config, settings of the run) -> an object of a class derived from Hooks, for what happens between steps
              fresh      True: the start is a new adapter, whose first values are no draws
              leaves_out True: some ranks are left out when the adapter is saved after the steps
              only_run   True: forward, saving and merging are checked, training is not
    LAYERS  peft_type -> class derived from Reference; left out where PEFT has the method

and make_method_fixtures.py does the rest. Names of tensors are `base_model.model.<module>.<ending>`.
"""

import torch
import torch.nn.functional as F


class Reference(torch.nn.Module):
    """A linear layer with an adapter. Trained tensors are Parameters, fixed ones buffers; each is saved under its attribute's name."""

    # Attribute -> ending in the file, where they differ.
    FILES = {}
    # Endings of tensors that all layers have in common.
    SHARED = ()

    def __init__(self, base, name, config):
        super().__init__()
        self.base, self.name, self.config = base, name, config
        self.base.requires_grad_(False)
        self.rank = config.get("r", 8)

    def forward(self, x):
        weight = self.weight()
        return F.linear(x, weight, self.base.bias)

    @classmethod
    def tie(cls, layers):
        """Lets layers share tensors."""

    def weight(self):
        """The weight that can take the place of base and adapter; None where there is none."""
        return None

    def initial(self):
        """For `initial = "prepared"`: (weight of the base as the adapter leaves it, what the adapter adds to it)."""
        raise NotImplementedError

    def tensors(self):
        """Ending in the file -> tensor."""
        own = dict(self.named_parameters(recurse=False)) | dict(self.named_buffers(recurse=False))
        return {self.FILES.get(n, n): t for n, t in own.items()}


class Hooks:
    """What a method does between steps, beyond AdamW on every trained tensor. Everything is optional."""

    def groups(self, model, lr, decay):
        """Parameter groups of AdamW."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr, "weight_decay": decay}]

    def optimizer(self, groups, **keys):
        return torch.optim.AdamW(groups, **keys)

    def loss(self, model):
        """A term that is added to the mean loss, once per step; None for none."""
        return None

    def before_step(self, model, step):
        """Before the forward pass of a step, from 0."""

    def after_backward(self, model, step):
        """After the gradients of a step are there, before they are clipped."""

    def after_step(self, model, step, lr):
        """After the optimizer."""


def wrap(model, config, layer):
    """The model with reference layers of a class at its targets."""
    for p in model.parameters():
        p.requires_grad_(False)
    targets = config["target_modules"]
    for name, module in list(model.named_modules()):
        hit = isinstance(module, torch.nn.Linear) and name != "lm_head"
        hit = hit and (targets == "all-linear" or name.split(".")[-1] in targets)
        if hit:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer(module, name, config))
    layer.tie(list(layers(model).values()))
    return model


def layers(model):
    """Name -> adapted layer of the references."""
    return {m.name: m for m in model.modules() if isinstance(m, Reference)}


def generator(name, config):
    """Random numbers of one layer."""
    return torch.Generator().manual_seed(sum(name.encode()) + 1000 * config.get("seed", 0))
