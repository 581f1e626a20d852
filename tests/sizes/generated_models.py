"""Small classifiers that use their input's size, batch and mode in ways drawn by chance, told by one-line recipes.

By hand, from this folder: ``build(Recipe(block="windows", steps=(Step("map", "padded"),)))`` gives the model.
"""

from __future__ import annotations

import math

import torch
from generated_numbers import BRANCHES, FORMULAS, USES
from generated_recipes import STRUCTURAL
from torch import nn
from torch.nn import functional as F


class Steps(nn.Module):
    """Steps one after the other; holds only the weights that they use."""

    def __init__(self, steps, dim):
        super().__init__()
        self.functions = [
            STRUCTURAL["map" if step.place == "between" else step.place][step.name] if not step.formula
            else using((USES | BRANCHES)[step.name], FORMULAS[step.formula])
            for step in steps
        ]  # fmt: skip
        used = {name for function in self.functions for name in names_in(function)}
        if "gain" in used:
            self.gain = nn.Parameter(torch.rand(dim) + 0.5)
        if "table" in used:
            self.table = nn.Parameter(torch.randn(1, dim, 4, 4))
        if "tokens" in used:
            self.tokens = nn.Parameter(torch.randn(1, 16 if "isqrt" in used else 256, dim))
        if "offsets" in used:
            self.offsets = nn.Parameter(torch.randn(16, 16))
        if "conv" in used:
            self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        if "norm" in used:
            self.norm = nn.BatchNorm2d(dim)
            self.norm.running_mean.normal_()
        if "cache" in used:
            self.cache = {}

    def forward(self, x, b, h, w):
        for function in self.functions:
            x = function(self, x, b, h, w)
        return x

    def masks(self, heads, h, w, kh, kw):
        return [function(self, heads, h, w, kh, kw) for function in self.functions]

    def on_map(self, x):
        for function in self.functions:
            x = function(self, x, len(x), *x.shape[2:])
        return x


def using(use, formula):
    def step(self, x, b, h, w):
        return use(self, x, formula(self, x, b, h, w))

    step.names = use.__code__.co_names
    return step


def names_in(function):
    return getattr(function, "names", function.__code__.co_names)


def steps_at(recipe, *places):
    """Keys of their own, for a dictionary of modules has a method ``values``."""
    return nn.ModuleDict({f"at_{place}": Steps(recipe.at(place), recipe.dim) for place in places if recipe.at(place)})


class Heads(nn.Module):
    """Attention of ``x`` [b, n, c] on ``keys`` [b, m, c], whose tokens lie on maps of h x w and kh x kw."""

    def __init__(self, recipe):
        super().__init__()
        dim, self.heads, self.core, self.split = recipe.dim, recipe.heads, recipe.core, recipe.split
        self.fused = "fused" in self.split and not recipe.block.startswith("reduced")
        if self.fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        self.on = steps_at(recipe, "queries", "values", "attended", "scale", "mask")

    def parted(self, x):
        b, n, c = x.shape
        if self.split == "view":
            return x.view(b, n, self.heads, c // self.heads).transpose(1, 2)
        if self.split == "unflatten":
            return x.unflatten(-1, (self.heads, -1)).permute(0, 2, 1, 3)
        return x.reshape(b, -1, self.heads, c // self.heads).transpose(1, 2)

    def step(self, place, x, b, h, w):
        return self.on[f"at_{place}"].forward(x, b, h, w) if f"at_{place}" in self.on else x

    def forward(self, x, keys, size, key_size, mask=None):
        b, n, c = x.shape
        h, w = size
        if self.fused:
            view = self.qkv(x).view if "view" in self.split else self.qkv(x).reshape
            q, k, v = view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self.parted(self.q(x)), self.parted(self.k(keys)), self.parted(self.v(keys))
        q, v = self.step("queries", q, b, h, w), self.step("values", v, b, *key_size)
        scale = (c // self.heads) ** -0.5
        if "at_scale" in self.on:
            scale = self.on["at_scale"].forward(q.new_ones(1, 1), b, h, w) * scale
        masks = [] if mask is None else [mask]
        if "at_mask" in self.on:
            masks += self.on["at_mask"].masks(self.heads, h, w, *key_size)
        y = self.attend(q, k, v, scale, masks)
        y = self.step("attended", y.transpose(1, 2).reshape(b, n, c), b, h, w)
        return self.proj(y)

    def attend(self, q, k, v, scale, masks):
        if self.core == "sdpa":
            added = None
            for mask in masks:
                if mask.dtype == torch.bool:
                    mask = torch.zeros(mask.shape).masked_fill(~mask, -1e4)
                mask = mask.to(q.dtype)
                added = mask if added is None else added + mask
            if isinstance(scale, torch.Tensor):
                q, scale = q * scale, 1.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)
        if self.core == "bmm":
            a = torch.bmm(q.flatten(0, 1) * scale, k.flatten(0, 1).mT).unflatten(0, q.shape[:2])
        elif self.core == "einsum":
            a = torch.einsum("bhid,bhjd->bhij", q, k) * scale
        else:
            a = q @ k.transpose(-2, -1) * scale
        for mask in masks:
            a = a.masked_fill(~mask, -1e4) if mask.dtype == torch.bool else a + mask
        a = a.softmax(dim=-1)
        return torch.einsum("bhij,bhjd->bhid", a, v) if self.core == "einsum" else a @ v


class ConvHeads(nn.Module):
    """Attention on a map [b, c, h, w] with projections by 1x1 convolutions."""

    attend = Heads.attend

    def __init__(self, recipe):
        super().__init__()
        dim, self.heads, self.core = recipe.dim, recipe.heads, recipe.core
        self.q, self.kv, self.out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(dim, dim, 1)
        self.on = steps_at(recipe, "scale", "mask")

    def forward(self, x, mask=None):
        b, c, h, w = x.shape
        q, (k, v) = self.q(x), self.kv(x).chunk(2, dim=1)
        q, k, v = (t.reshape(b, self.heads, c // self.heads, h * w).transpose(2, 3) for t in (q, k, v))
        scale = (c // self.heads) ** -0.5
        if "at_scale" in self.on:
            scale = self.on["at_scale"].forward(q.new_ones(1, 1), b, h, w) * scale
        masks = [] if mask is None else [mask]
        if "at_mask" in self.on:
            masks += self.on["at_mask"].masks(self.heads, h, w, h, w)
        return self.out(self.attend(q, k, v, scale, masks).transpose(2, 3).reshape(b, c, h, w))


class Block(nn.Module):
    """Norm, attention and an MLP, on tokens or on a map."""

    def __init__(self, recipe):
        super().__init__()
        self.recipe, dim = recipe, recipe.dim
        self.norm = nn.GroupNorm(1, dim) if recipe.block == "conv map" else nn.LayerNorm(dim)
        self.attn = (ConvHeads if recipe.block == "conv map" else Heads)(recipe)
        if recipe.block == "reduced":
            self.reduce, self.key_norm = nn.Conv2d(dim, dim, 2, 2), nn.LayerNorm(dim)
        if recipe.mlp:
            kinds = (nn.Conv2d, (1,)) if recipe.block == "conv map" else (nn.Linear, ())
            self.fc1, self.fc2 = kinds[0](dim, 2 * dim, *kinds[1]), kinds[0](2 * dim, dim, *kinds[1])
        self.steps = Steps(recipe.at("tokens"), dim)
        self.resolution = tuple(side // recipe.patch for side in recipe.image)

    def attend(self, *given):
        return (self.attn if self.recipe.shell == "modules" else self.attn.forward)(*given)

    def forward(self, x, size=None, w=None, shape=None, mask=None):
        kind, training = self.recipe.block, self.training
        if training and self.recipe.skipping == "in training":
            return x
        if kind in ("map", "rows", "windows"):
            h, w = x.shape[1:3]
        elif kind == "conv map":
            h, w = x.shape[2:]
        else:
            h, w = self.sides(x, size, w, shape)
            x = self.steps.forward(x, len(x), h, w)
        y = self.mixed(self.norm(x), h, w, mask)
        if training and self.recipe.skipping == "by chance":
            y = y * (torch.rand((len(y),) + (1,) * (y.ndim - 1)) < 0.5)
        elif self.recipe.skipping == "batch of one":
            y = y if len(y) > 1 else 0.5 * y
        x = x + y
        if self.recipe.mlp:
            x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return x

    def sides(self, x, size, w, shape):
        n, way = x.shape[1], self.recipe.sizes
        if way == "root":
            return int(n**0.5), int(n**0.5)
        if way == "isqrt":
            return math.isqrt(n), n // math.isqrt(n)
        if way == "attributes":
            return self.h, self.w
        if way == "resolution":
            return self.resolution
        return (size, w) if way == "arguments" else size if way == "tuple" else (shape["h"], shape["w"])

    def mixed(self, x, h, w, mask):
        kind, recipe = self.recipe.block, self.recipe
        if kind == "conv map":
            return self.attend(x, mask)
        if kind == "map":
            y = x.reshape(len(x), h * w, x.shape[-1])
            return self.attend(y, y, (h, w), (h, w), mask).reshape(x.shape)
        if kind == "rows":
            y = x.reshape(-1, w, x.shape[-1])
            return self.attend(y, y, (1, w), (1, w)).view(*x.shape)
        if kind == "tokens":
            return self.attend(x, x, (h, w), (h, w), mask)
        if "windows" in kind:
            return self.windows(x.view(len(x), h, w, -1), h, w).reshape(x.shape)
        b, c = len(x), x.shape[2]
        y = x.transpose(1, 2).reshape(b, c, h, w)
        if kind == "reduced":
            y = self.reduce(y)
        else:
            y = F.adaptive_avg_pool2d(y, (max(h // 2, 1), max(w // 2, 1)) if recipe.clamped else 2)
        keys = y.reshape(b, c, -1).transpose(1, 2)
        if kind == "reduced":
            keys = self.key_norm(keys)
        return self.attend(x, keys, (h, w), tuple(y.shape[2:]), mask)

    def windows(self, x, height, width):
        recipe, b, c, s = self.recipe, len(x), x.shape[-1], self.recipe.window
        if recipe.clamped:
            s = min(s, height, width)
        if recipe.padded:
            x = F.pad(x, (0, 0, 0, -width % s, 0, (s - height % s) % s))
        h, w = x.shape[1:3]
        shift = {"half window": s // 2, "if larger": s // 2 if min(h, w) > s else 0, "quarter map": h // 4}
        shift = shift.get(recipe.shift, 0)
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
        t = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, s * s, c)
        if recipe.batch == "loop":
            count = (h // s) * (w // s)
            t = t.view(b, count, s * s, c)
            t = torch.stack([self.attend(t[:, i], t[:, i], (s, s), (s, s)) for i in range(count)], 1).flatten(0, 1)
        else:
            t = self.attend(t, t, (s, s), (s, s))
        if recipe.batch == "divided":
            b = int(t.shape[0] / (h * w / s / s))
        elif recipe.batch == "-1":
            b = -1
        t = t.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(len(x), h, w, c)
        if shift:
            t = torch.roll(t, (shift, shift), (1, 2))
        return t[:, :height, :width]


class Stem(nn.Module):
    """Patches of an image, as a map."""

    def __init__(self, recipe):
        super().__init__()
        self.kind, self.patch, p, dim = recipe.stem, recipe.patch, recipe.patch, recipe.dim
        if "patches" in self.kind:
            self.embed = nn.Linear(3 * p * p, dim)
        elif self.kind == "two convs":
            self.embed = nn.Sequential(nn.Conv2d(3, dim, 3, 2, 1), nn.GELU(), nn.Conv2d(dim, dim, p // 2, p // 2))
        else:
            self.embed = nn.Conv2d(3, dim, p, p)
        self.steps = Steps(recipe.at("image"), 3)

    def forward(self, x):
        p, (b, c, h, w) = self.patch, x.shape
        x = self.steps.forward(x, b, h, w)
        if self.kind == "conv padded":
            x = F.pad(x, (0, (p - w % p) % p, 0, (p - h % p) % p))
        if self.kind == "patches by reshape":
            x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, h // p, w // p, -1)
            return self.embed(x).permute(0, 3, 1, 2)
        if self.kind == "patches by unfold":
            x = self.embed(F.unfold(x, p, stride=p).transpose(1, 2))
            return x.transpose(1, 2).view(b, -1, h // p, w // p)
        return self.embed(x)


class Net(nn.Module):
    def __init__(self, recipe):
        super().__init__()
        self.recipe, dim = recipe, recipe.dim
        self.stem = Stem(recipe)
        self.before, self.between = Steps(recipe.at("map"), dim), Steps(recipe.at("between"), dim)
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.blocks))
        self.masks = Steps(recipe.at("given mask"), dim)
        self.classifies = "class" in recipe.pool
        if self.classifies:
            self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(4 * dim if recipe.pool == "pooled map" else dim, 5)
        if recipe.pool == "with auxiliary in training":
            self.aux = nn.Linear(dim, 3)
        self.last = Steps(recipe.at("logits"), 5)

    def forward(self, x):
        x = self.before.on_map(self.stem(x))
        for i, block in enumerate(self.blocks):
            if i and self.between.functions:
                x = self.between.on_map(x)
            x, first = self.through(block, x)
        h, w = x.shape[2:]
        y = self.pooled(x.flatten(2).transpose(1, 2), first, h, w)
        return self.last.forward(y, len(x), h, w) if self.last.functions else y

    def given_mask(self, h, w):
        mask = None
        if self.masks.functions:
            kh, kw = (h // 2, w // 2) if self.recipe.block == "reduced" else (h, w)
            mask = self.masks.masks(self.recipe.heads, h, w, kh, kw)[0]
        return mask

    def through(self, block, x):
        """The map [b, c, h, w] behind a block, and the class token."""
        kind, way, call = self.recipe.block, self.recipe.sizes, block.forward if self.recipe.shell == "net" else block
        b, c, h, w = x.shape
        mask = self.given_mask(h, w)
        if kind == "conv map":
            return call(x, mask=mask), None
        if kind in ("map", "rows", "windows"):
            return call(x.permute(0, 2, 3, 1), mask=mask).permute(0, 3, 1, 2), None
        x = x.flatten(2).transpose(1, 2)
        if self.classifies:
            x = torch.cat([self.cls.expand(b, -1, -1), x], 1)
        if way == "attributes":
            block.h, block.w = h, w
        if way == "arguments":
            x = call(x, h, w, mask=mask)
        elif way == "tuple":
            x = call(x, (h, w), mask=mask)
        elif way == "dict":
            x = call(x, shape={"h": h, "w": w}, mask=mask)
        else:
            x = call(x, mask=mask)
        first, x = (x[:, 0], x[:, 1:]) if self.classifies else (None, x)
        if x.shape[1] != h * w:
            return x.transpose(1, 2).unsqueeze(-1), first
        return x.transpose(1, 2).reshape(b, c, h, w), first

    def pooled(self, x, first, h, w):
        pool, n = self.recipe.pool, x.shape[1]
        x = self.norm(x)
        if pool == "class token":
            x = x.mean(1) * 0.5 + first
        elif pool == "sum over n":
            x = x.sum(1) / (h * w)
        elif pool == "sum by factor":
            x = x.sum(1) * (1 / n)
        elif pool == "max":
            x = x.amax(1)
        elif pool == "first":
            x = x[:, 0]
        elif pool == "middle":
            x = x[:, n // 2]
        elif pool == "weighted":
            x = (x * torch.linspace(0.1, 1, n)[:, None]).sum(1) / n
        elif pool == "upper rows":
            x = x[:, : (h // 2 + 1) * w].mean(1)
        elif pool == "pooled map":
            x = F.adaptive_avg_pool2d(x.transpose(1, 2).reshape(len(x), -1, h, w), 2).flatten(1)
        elif pool == "with auxiliary in training" and self.training:
            return self.head(x.mean(1)), self.aux(x[:, n // 3])
        else:
            x = x.mean(1)
        return self.head(x)


def build(recipe):
    """The model in float64 and eval mode, with weights so large that attention is far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = Net(recipe).double().eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.endswith("weight"):
                nn.init.normal_(parameter, std=1.4 / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    return model
