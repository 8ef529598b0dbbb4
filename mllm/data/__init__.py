"""What is on disk -> `RegionSample`: one record for every data set, trainer and task."""
