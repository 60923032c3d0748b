"""Checkpoints: whole or absent, verified before they are read, and with a predecessor to fall back on."""

import errno
import logging
import os
import random
import sys

import pytest
import torch
from quiet_trainer import quiet_trainer

from lightning_modules import VAE, CorruptCheckpointError, VerifiedCheckpointIO
from lightning_modules.checkpoints import damage, newest_intact
from lightning_modules.cli import main
from lightning_modules.data import Digits

IO = VerifiedCheckpointIO()


def content(epoch):
    generator = torch.Generator().manual_seed(epoch)
    return {"epoch": epoch, "state_dict": {"a": torch.randn(300, generator=generator), "b": torch.ones(20, 20)}}


def same(ours, theirs):
    return ours["epoch"] == theirs["epoch"] and all(
        torch.equal(ours["state_dict"][k], theirs["state_dict"][k]) for k in theirs["state_dict"]
    )


@pytest.fixture
def saved(tmp_path):
    for epoch in (1, 2):
        IO.save_checkpoint(content(epoch), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_what_is_written_is_read_and_the_predecessor_is_kept(saved):
    assert same(IO.load_checkpoint(saved), content(2))
    assert same(IO.load_checkpoint(f"{saved}.previous"), content(1))
    assert sorted(os.listdir(saved.parent)) == ["last.ckpt", "last.ckpt.previous"]
    assert same(torch.load(saved, weights_only=True), content(2))  # a plain file of torch's


def test_a_predecessor_is_kept_only_where_it_is_wanted(tmp_path):
    io = VerifiedCheckpointIO(keep_previous=False)
    for epoch in (1, 2):
        io.save_checkpoint(content(epoch), tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_no_flipped_bit_and_no_truncation_is_read_as_other_weights(saved, seed):
    whole, rng, named = saved.read_bytes(), random.Random(seed), 0
    for number in range(300):
        damaged = bytearray(whole)
        if number % 2:
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(whole)) :]
        saved.write_bytes(damaged)
        try:
            assert same(IO.load_checkpoint(saved), content(2))  # a bit of the padding between records
        except CorruptCheckpointError as error:
            named += 1
            assert str(saved) in str(error) and f"{saved}.previous" in str(error)
    assert named > 200


def test_control_torch_reads_a_flipped_bit_as_another_weight(saved):
    whole = bytearray(saved.read_bytes())
    at = whole.index(content(2)["state_dict"]["a"].numpy().tobytes())
    whole[at] ^= 1
    saved.write_bytes(whole)
    assert not same(torch.load(saved, weights_only=True), content(2))
    assert "does not have its checksum" in damage(saved)


def test_the_newest_intact_checkpoint_is_offered(tmp_path):
    for epoch, name in enumerate(("a.ckpt", "b.ckpt", "c.ckpt")):
        IO.save_checkpoint(content(epoch), tmp_path / name)
        os.utime(tmp_path / name, (epoch, epoch))
    assert newest_intact(tmp_path) == tmp_path / "c.ckpt"
    (tmp_path / "c.ckpt").write_bytes(b"")
    (tmp_path / "b.ckpt").write_bytes(b"no zip")
    with pytest.raises(CorruptCheckpointError, match=r"a\.ckpt"):
        IO.load_checkpoint(tmp_path / "c.ckpt")
    (tmp_path / "a.ckpt").unlink()
    with pytest.raises(CorruptCheckpointError, match="start anew"):
        IO.load_checkpoint(tmp_path / "c.ckpt")


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(saved, monkeypatch):
    before = saved.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*resume from .*last\.ckpt$"):
        IO.save_checkpoint(content(3), saved)
    assert saved.read_bytes() == before
    assert sorted(os.listdir(saved.parent)) == ["last.ckpt", "last.ckpt.previous"]


def test_a_folder_that_cannot_be_made_is_an_error_with_the_checkpoint_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="no checkpoint yet"):
        IO.save_checkpoint(content(1), tmp_path / "file" / "x.ckpt")


def test_a_partial_file_of_a_killed_process_is_no_checkpoint_and_is_replaced(saved):
    (saved.parent / "last.ckpt.partial").write_bytes(b"half")
    assert newest_intact(saved.parent) == saved
    IO.save_checkpoint(content(3), saved)
    assert sorted(os.listdir(saved.parent)) == ["last.ckpt", "last.ckpt.previous"]


def test_objects_are_not_unpickled_unless_it_is_asked_for(tmp_path):
    IO.save_checkpoint({"object": Thing()}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        IO.load_checkpoint(tmp_path / "x.ckpt")
    assert isinstance(IO.load_checkpoint(tmp_path / "x.ckpt", weights_only=False)["object"], Thing)


class Thing:
    pass


def test_it_is_a_plugin_of_the_trainer(tmp_path):
    trainer = quiet_trainer(plugins=[VerifiedCheckpointIO()], max_steps=1)
    trainer.fit(VAE("straight_through", {"latent_dim": 2}), Digits(binarization="dynamic"))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert {"x.ckpt", "x.ckpt.previous"} <= set(os.listdir(tmp_path))


FIT = ["fit", "--model.layer=straight_through", "--data=Digits", "--data.binarization=dynamic", "--ckpt_path=last"]
FIT += ["--checkpoint.dirpath=kept", "--trainer.accelerator=cpu", "--trainer.limit_train_batches=4"]
FIT += [
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.dirpath=kept",
    "--trainer.callbacks.save_last=true",
]
FIT += ["--trainer.callbacks.every_n_train_steps=3", "--model.iwae_samples={}"]
FIT += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice on resuming in the same folder
def test_the_command_line_continues_from_the_last_checkpoint_and_names_a_damaged_one(
    tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stochastic-layers"])
    main([*FIT, "--trainer.max_steps=5"])
    assert "best weights" in capfd.readouterr().out
    assert torch.load("kept/last.ckpt", weights_only=True)["global_step"] == 4  # the end of the epoch
    caplog.set_level(logging.INFO)
    main([*FIT, "--trainer.max_steps=10"])
    out = capfd.readouterr().out
    assert "Restored all states from the checkpoint" in caplog.text and "kept/last.ckpt" in caplog.text
    assert "kept/best.ckpt" in out.replace("\n", "")  # the best weights, and not those of the other ModelCheckpoint
    with open("kept/last.ckpt", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(SystemExit, match=r"needed an intact checkpoint, got .*last\.ckpt.*newest intact one"):
        main([*FIT, "--trainer.max_steps=15"])
