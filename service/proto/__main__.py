"""Generates the messages of the `.proto` files beside it: `python -m service.proto FOLDER…`.

Each folder gets `grpc_service_pb2.py` and, for type checkers, `grpc_service_pb2.pyi`; the service's own
folder also gets those of gRPC's standard services, and what it reads of ONNX files.
"""

import base64
import sys
import tempfile
import textwrap
from pathlib import Path

from google.protobuf import descriptor_pb2  # type: ignore[import-untyped,unused-ignore]
from grpc_tools import protoc  # type: ignore[import-untyped,unused-ignore]

PROTO = Path(__file__).with_name("grpc_service.proto")
OWN = [Path(__file__).with_name(name) for name in ("health.proto", "reflection.proto", "onnx_weights.proto")]

# protoc's own Python code puts every message into one pool for the whole process. The public
# Triton client does so too, under the same names, and two files may not define one name:
# whichever is imported second fails. It also demands the newest protobuf; this does not.
TEMPLATE = '''\
"""Generated from {name} by `python -m service.proto`; do not edit.

The messages live in a pool of their own, so that other clients of the protocol, which
define the same names, can be imported beside them.
"""

import base64

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.internal import enum_type_wrapper

DESCRIPTOR = descriptor_pool.DescriptorPool().AddSerializedFile(
    base64.b64decode(
        """
{descriptor}
        """
    )
)


def _message_class(descriptor):
    message = message_factory.GetMessageClass(descriptor)
    for nested in descriptor.nested_types:
        if not hasattr(message, nested.name):  # protobuf without its C extension leaves them out
            setattr(message, nested.name, _message_class(nested))
    return message


for _name, _enum in DESCRIPTOR.enum_types_by_name.items():
    globals()[_name] = enum_type_wrapper.EnumTypeWrapper(_enum)
    globals().update((_value.name, _value.number) for _value in _enum.values)

for _name, _descriptor in DESCRIPTOR.message_types_by_name.items():
    globals()[_name] = _message_class(_descriptor)
'''


def describe(types_folder: Path, proto: Path = PROTO) -> bytes:
    """Compile a proto: its serialized `FileDescriptorProto`, and its types in `types_folder`.

    Raises:
        SystemExit: protoc refuses the file; it has said why on standard error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        compiled = Path(scratch) / "set.binpb"
        arguments = [f"-I{proto.parent}", f"--pyi_out={types_folder}", f"--descriptor_set_out={compiled}"]
        status = protoc.main(["protoc", *arguments, proto.name])
        if status:
            raise SystemExit(status)
        files = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes()).file
    return bytes(files[0].SerializeToString(deterministic=True))


def generate(folder: Path, proto: Path = PROTO) -> None:
    """Write both generated files into `folder`."""
    encoded = base64.b64encode(describe(folder, proto)).decode()
    descriptor = textwrap.indent(textwrap.fill(encoded, 96), " " * 8)
    module = folder / f"{proto.stem}_pb2.py"
    module.write_text(TEMPLATE.format(name=proto.name, descriptor=descriptor), encoding="utf-8")
    types = module.with_suffix(".pyi")
    # protoc's types do not pass a strict checker: that is protoc's to mend, not ours.
    types.write_text(f"# mypy: ignore-errors\n{types.read_text(encoding='utf-8')}", encoding="utf-8")


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit("usage: python -m service.proto FOLDER…")
    for name in sys.argv[1:]:
        folder = Path(name)
        generate(folder)
        if folder.resolve() == PROTO.parent.resolve():
            for proto in OWN:
                generate(folder, proto)
