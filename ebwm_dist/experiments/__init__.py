"""Many training runs side by side, in processes or as jobs of a Ray cluster; scaling studies made of them"""
