"""The messages of the Open Inference Protocol, generated from `grpc_service.proto`."""
