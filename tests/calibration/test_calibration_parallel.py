"""Two processes with half the images each come to the weights of one process with all."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_pair import calibrate, images, same_weights


def _process(rank, folder, value_step):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    settings = {"data": images(24)[rank::2], "n": 24, "value_step": value_step}
    settings["resume"] = f"{folder}/state.safetensors"
    model = calibrate(**settings)
    assert same_weights(calibrate(**settings), model), "both go on from the first one's file"
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("value_step", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_come_to_the_same_weights_as_one(tmp_path, value_step):
    mp.spawn(_process, (str(tmp_path), value_step), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = calibrate(data=images(24), n=24, value_step=value_step).state_dict()
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-5)  # float32 sums in another order
