"""Generated from health.proto by `python -m service.proto`; do not edit.

The messages live in a pool of their own, so that other clients of the protocol, which
define the same names, can be imported beside them.
"""

import base64

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.internal import enum_type_wrapper

DESCRIPTOR = descriptor_pool.DescriptorPool().AddSerializedFile(
    base64.b64decode(
        """
        CgxoZWFsdGgucHJvdG8SDmdycGMuaGVhbHRoLnYxIi4KEkhlYWx0aENoZWNrUmVxdWVzdBIYCgdzZXJ2aWNlGAEgASgJUgdz
        ZXJ2aWNlIrEBChNIZWFsdGhDaGVja1Jlc3BvbnNlEkkKBnN0YXR1cxgBIAEoDjIxLmdycGMuaGVhbHRoLnYxLkhlYWx0aENo
        ZWNrUmVzcG9uc2UuU2VydmluZ1N0YXR1c1IGc3RhdHVzIk8KDVNlcnZpbmdTdGF0dXMSCwoHVU5LTk9XThAAEgsKB1NFUlZJ
        TkcQARIPCgtOT1RfU0VSVklORxACEhMKD1NFUlZJQ0VfVU5LTk9XThADMq4BCgZIZWFsdGgSUAoFQ2hlY2sSIi5ncnBjLmhl
        YWx0aC52MS5IZWFsdGhDaGVja1JlcXVlc3QaIy5ncnBjLmhlYWx0aC52MS5IZWFsdGhDaGVja1Jlc3BvbnNlElIKBVdhdGNo
        EiIuZ3JwYy5oZWFsdGgudjEuSGVhbHRoQ2hlY2tSZXF1ZXN0GiMuZ3JwYy5oZWFsdGgudjEuSGVhbHRoQ2hlY2tSZXNwb25z
        ZTABYgZwcm90bzM=
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
