"""Model to graph: Dynamo's capture as data (`dynamo`, `guards`), and which model this is (`fingerprint`)."""
