"""bin/checkpoints. Run: python -m pytest tests/commands/test_checkpoints.py"""

from resilient_t5.commands.checkpoints import main
from tests.checkpoint.harness import commit, live_names, make_manager


def test_it_lists_what_is_there_and_finds_one_flipped_bit_only_when_it_reads(tmp_path, capsys):
    """Sizes alone do not show it; --verify does, with 66; nothing is moved or written."""
    commit(make_manager(tmp_path), 1, 2)
    assert main([str(tmp_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == live_names(tmp_path)[::-1]
    assert main([str(tmp_path), "--verify"]) == 0
    file = tmp_path / "checkpoints" / live_names(tmp_path)[1] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main([str(tmp_path)]) == 0
    capsys.readouterr()
    assert main([str(tmp_path), "--verify"]) == 66
    out = capsys.readouterr().out.splitlines()
    assert "DAMAGED" in out[0] and "sha256" not in out[1] and "verified" in out[1]
    assert len(live_names(tmp_path)) == 2


def test_a_folder_without_checkpoints_is_told(tmp_path, capsys):
    """Exit 66 and where it looked."""
    assert main([str(tmp_path)]) == 66
    assert str(tmp_path) in capsys.readouterr().err
