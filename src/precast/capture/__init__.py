"""Model to graph: Dynamo's capture as data (`dynamo`, `guards`), and a model's `fingerprint`."""
