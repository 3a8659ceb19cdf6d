"""Does this container take work? Ends with 0 if `/readyz` says so; the image's health check."""

import os
import ssl
import sys
import urllib.request

port = os.environ.get("BENTOML_PORT", "3000")
is_tls = "QUINTET_TLS_CERTIFICATE" in os.environ
# It asks its own machine, by a number that no certificate names: who answers is not in doubt.
context = ssl._create_unverified_context() if is_tls else None
address = f"{'https' if is_tls else 'http'}://127.0.0.1:{port}/readyz"
opener = urllib.request.build_opener(
    urllib.request.ProxyHandler({}),
    *([urllib.request.HTTPSHandler(context=context)] if context else []),
)
try:
    with opener.open(address, timeout=4) as answer:
        answer.read()
except OSError as error:
    sys.exit(f"not ready: {error}")
