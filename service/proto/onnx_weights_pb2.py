"""Generated from onnx_weights.proto by `python -m service.proto`; do not edit.

The messages live in a pool of their own, so that other clients of the protocol, which
define the same names, can be imported beside them.
"""

import base64

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.internal import enum_type_wrapper

DESCRIPTOR = descriptor_pool.DescriptorPool().AddSerializedFile(
    base64.b64decode(
        """
        ChJvbm54X3dlaWdodHMucHJvdG8SDG9ubnhfd2VpZ2h0cyIyCgVNb2RlbBIpCgVncmFwaBgHIAEoCzITLm9ubnhfd2VpZ2h0
        cy5HcmFwaFIFZ3JhcGgiZwoFR3JhcGgSJgoEbm9kZRgBIAMoCzISLm9ubnhfd2VpZ2h0cy5Ob2RlUgRub2RlEjYKC2luaXRp
        YWxpemVyGAUgAygLMhQub25ueF93ZWlnaHRzLlRlbnNvclILaW5pdGlhbGl6ZXIiTQoETm9kZRIUCgVpbnB1dBgBIAMoCVIF
        aW5wdXQSFgoGb3V0cHV0GAIgAygJUgZvdXRwdXQSFwoHb3BfdHlwZRgEIAEoCVIGb3BUeXBlIosBCgZUZW5zb3ISEgoEZGlt
        cxgBIAMoA1IEZGltcxIbCglkYXRhX3R5cGUYAiABKAVSCGRhdGFUeXBlEiEKCmludDMyX2RhdGEYBSADKAVCAhABUglpbnQz
        MkRhdGESEgoEbmFtZRgIIAEoCVIEbmFtZRIZCghyYXdfZGF0YRgJIAEoDFIHcmF3RGF0YQ==
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
