"""Two nodes of Ray on this machine with Quintet on both: `python -m tests.deploy.ray_cluster MODELS PORT`.

Says `ready` when it serves, loses its second node at the word `kill` on standard input, and says
`killed`; ends at the input's end.
"""

import sys

import ray
from ray import serve
from ray.cluster_utils import Cluster

from deploy.ray.engine import Arguments, build

MEMORY = 100 * 2**20
"""Of each node's object store, in bytes: pictures are small."""


def main() -> None:
    """Start, obey, end."""
    models, port = sys.argv[1], int(sys.argv[2])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": MEMORY, "include_dashboard": False},
    )
    second = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    # Both nodes have one address here, so there is one proxy, on the node that stays.
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(Arguments(replicas=2, most_replicas=2, replicas_per_node=1, models=models)))
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            # As if its plug were pulled.
            cluster.remove_node(second, allow_graceful=False)
            print("killed", flush=True)
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
