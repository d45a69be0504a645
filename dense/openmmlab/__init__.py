"""What segmentation and pretraining share on MMEngine; it needs mmengine and no other framework."""
