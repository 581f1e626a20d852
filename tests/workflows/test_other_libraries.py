"""Converted models in the hands of libraries that train, adapt and explain models: run by ``make workflows``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_conversions import IMAGE, batches, converted_model, logits, swin, transformers_vit, vit
from torch import nn

import attnrewrite

TARGETS = [
    ("neighborhood", {"kernel_size": 3}),
    ("aggregated", {}),
    ("conv_glu", {}),
    ("manhattan", {}),
]


def extra(name):
    """A library of the extra ``workflows``, which ``make workflows`` installs; without it the test is skipped."""
    return pytest.importorskip(name, reason=f"{name} is in the extra `workflows`")


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, *IMAGE, generator=generator), "labels": torch.tensor(index % 5)}


@pytest.mark.parametrize(("to", "options"), TARGETS)
@pytest.mark.parametrize("labeled", [False, True])
def test_transformers_trainer(to, options, labeled, tmp_path):
    extra("accelerate")
    from transformers import Trainer, TrainingArguments

    donor = transformers_vit().eval()
    example = {"pixel_values": torch.randn(1, 3, *IMAGE)} | ({"labels": torch.tensor([1])} if labeled else {})
    model = attnrewrite.convert(donor, to, example, progress=False, **options)
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", gradient_accumulation_steps=2, eval_strategy="steps",
        eval_steps=2,
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model, arguments, train_dataset=Images(), eval_dataset=Images())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(Images()).predictions.shape == (8, 5)
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_accelerate(model):
    accelerate = extra("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model.train(), torch.optim.SGD(model.parameters(), lr=0.1))
    for images, labels in batches():
        loss = F.cross_entropy(logits(prepared(images)), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert accelerator.unwrap_model(prepared) is model
    assert accelerator.get_state_dict(prepared).keys() == model.state_dict().keys()


def test_lightning(model, tmp_path):
    lightning = extra("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return F.cross_entropy(logits(self.model(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path)],
    )  # fmt: skip
    trainer.fit(Classifier(), torch.utils.data.DataLoader(list(batches()), batch_size=None))
    (checkpoint,) = tmp_path.glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state.keys() == {f"model.{name}" for name in model.state_dict()}


@pytest.mark.parametrize("make", [vit, swin, transformers_vit])
@pytest.mark.parametrize("to", ["identity", "neighborhood"])
def test_low_rank_adapters_before_and_after(make, to):
    peft = extra("peft")
    options = {"kernel_size": 3} if to == "neighborhood" else {}
    names = ["q_proj", "v_proj", "fc1"] if make is transformers_vit else ["qkv", "fc1", "proj"]
    config = peft.LoraConfig(target_modules=names, r=4, lora_alpha=8, lora_dropout=0.1, init_lora_weights=False)
    images, _ = next(batches(1))
    torch.manual_seed(0)
    donor = peft.get_peft_model(make(), config).eval()
    converted = attnrewrite.convert(donor, to, images[:1], progress=False, **options)
    assert len(attnrewrite.report(converted).converted) >= 2
    if to == "identity":
        assert torch.allclose(logits(converted(images)), logits(donor(images)), atol=1e-5)
    logits(converted.train()(images)).square().sum().backward()
    trained = {name for name, p in converted.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained
    assert all("lora_" in name for name in trained if "attnrewrite" not in name and "mlp" not in name)
    before = logits(converted.eval()(images)).detach()
    merged = converted.merge_and_unload()
    assert torch.allclose(logits(merged(images)), before, atol=1e-4)

    torch.manual_seed(0)
    later = peft.get_peft_model(converted_model(make, to, options), config).eval()
    assert logits(later(images)).isfinite().all()
    assert torch.allclose(logits(later.merge_and_unload()(images)), logits(later(images)), atol=1e-4)


def test_low_rank_adapters_on_a_converted_multihead_attention():
    peft = extra("peft")
    torchvision = extra("torchvision")
    donor = torchvision.models.VisionTransformer(32, 4, 2, 2, 32, 64, num_classes=5).eval()
    nn.init.normal_(donor.heads.head.weight)
    images, _ = next(batches(1))
    config = peft.LoraConfig(target_modules=["self_attention"], r=4, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(donor, config)
    expected = adapted(images).detach()
    adapted.unload()
    for to in ("identity", "neighborhood"):
        converted = attnrewrite.convert(donor, to, images[:1], progress=False)
        torch.manual_seed(0)
        later = peft.get_peft_model(converted, config)
        if to == "identity":
            assert torch.allclose(later(images), expected, atol=1e-5)
        later(images).sum().backward()
        assert any(p.grad is not None and p.grad.any() for n, p in later.named_parameters() if "lora_" in n)


def test_grad_cam():
    extra("pytorch_grad_cam")
    from pytorch_grad_cam import GradCAM

    model = converted_model(swin, "neighborhood", {"kernel_size": 3})
    images, _ = next(batches(1))
    target = model.layers[-1].blocks[-1].norm1
    maps = GradCAM(model, [target], reshape_transform=lambda value: value.permute(0, 3, 1, 2))(images, None)
    assert maps.shape == (4, *IMAGE)


def test_captum(model):
    captum = extra("captum")
    images, labels = next(batches(1))

    class Logits(nn.Module):
        def forward(self, images):
            return logits(model(images))

    attributions = captum.attr.IntegratedGradients(Logits()).attribute(images, target=labels, n_steps=4)
    assert attributions.shape == images.shape
    assert attributions.any()
