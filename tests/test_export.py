"""Encoder and decoder without Pyro: torch.export, ONNX and safetensors of nets with convolutions and normalisation."""

import pytest
import torch

from pyro_wae.demo.nets import DigitWAE
from pyro_wae.predict import decode, encode

pytestmark = pytest.mark.slow  # seconds to trace, and to import


@pytest.fixture(scope="module")
def nets():
    """A net in use, and for each part an example input, other inputs in another number, and what Pyro makes of them."""
    torch.manual_seed(0)
    net, x, z = DigitWAE(zdim=8).eval(), torch.rand(7, 1, 28, 28), torch.randn(7, 8)
    codes = encode(net.model, net.guide, x)["z"]
    images = decode(net.model, {"z": z}, x)["x"]
    return {"encoder": (net.encoder, torch.rand(4, 1, 28, 28), x, codes), "decoder": (net.decoder, z[:4], z, images)}


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_exported_part_agrees_with_pyro_for_other_numbers_of_data(nets, part, tmp_path):
    net, example, given, expected = nets[part]
    program = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for n in (1, len(given)):
        torch.testing.assert_close(loaded(given[:n]).detach(), expected[:n])


@pytest.mark.filterwarnings("ignore")  # onnxscript's own
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_onnx_agrees_with_pyro_for_other_numbers_of_data(nets, part, tmp_path):
    pytest.importorskip("onnxscript", reason="pip install 'pyro-wae[export]'")
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'pyro-wae[export]'")
    net, example, given, expected = nets[part]
    options = {"input_names": ["given"], "output_names": ["made"], "dynamic_shapes": ({0: torch.export.Dim("n")},)}
    torch.onnx.export(net, (example,), tmp_path / "net.onnx", dynamo=True, **options)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    for n in (1, len(given)):
        (found,) = session.run(None, {"given": given[:n].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[:n], rtol=1e-4, atol=1e-5)


def test_safetensors_keep_the_weights_and_what_describes_them(tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="pip install 'pyro-wae[export]'")
    files = pytest.importorskip("safetensors.torch")
    net, other = DigitWAE(zdim=3), DigitWAE(zdim=3)
    files.save_file(net.state_dict(), tmp_path / "net.safetensors", metadata={"latent_dim": "3"})
    with safetensors.safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata()["latent_dim"] == "3"
    other.load_state_dict(files.load_file(tmp_path / "net.safetensors"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())
