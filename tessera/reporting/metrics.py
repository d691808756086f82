"""The metrics of evaluations: what they mean, and their direction."""

HIGHER_IS_BETTER = {"is", "precision", "recall", "density", "coverage", "authenticity", "accuracy"}
HIGHER_IS_BETTER |= {"alignment", "alignment_one_object", "alignment_two_objects", "binding", "relation"}
HIGHER_IS_BETTER |= {"composition", "clip_score", "law", "law_occluded", "class_accuracy"}

MEANING = {
    "fd": "Fréchet distance of the features; lower is better; falls with the number of samples",
    "frame_fd": "Fréchet distance of the features of single frames; blind to motion; lower is better",
    "motion": "Wasserstein distance of the mean differences between frames, in levels; lower is better; a still clip "
    "is far",
    "fd_inf": "Fréchet distance extrapolated to infinitely many samples; lower is better",
    "sfid": "Fréchet distance of spatial features: layout rather than content; lower is better",
    "kid": "kernel distance, unbiased at any number of samples; lower is better, 0 is equal",
    "is": "Inception score: how sharp and varied images are by the classes of the classifier; higher is better",
    "precision": "fraction of samples among the reference images (fidelity); higher is better",
    "recall": "fraction of reference images among the samples (diversity); higher is better",
    "density": "how densely samples lie around reference images; 1 for reference images themselves",
    "coverage": "fraction of reference images with a sample near; higher is better",
    "authenticity": "fraction of samples no nearer to their reference image than its own neighbor; copies lower it",
    "accuracy": "fraction of images that show their class, by the oracle",
    "alignment": "fraction of images that show all of their caption; higher is better",
    "alignment_one_object": "the same for captions of one object: shape, color and size",
    "alignment_two_objects": "the same for captions of two objects: both, and where one is relative to the other",
    "binding": "fraction of images that show the color and shape of both objects of their caption; higher is better",
    "relation": "fraction of images with two objects where the caption states; higher is better",
    "swapped_colors": "fraction of images that show both objects with the colors exchanged; lower is better",
    "composition": "alignment of captions with a combination of color and shape that data.combinations=known leaves "
    "out of training; higher is better",
    "clip_score": "100 x cosine similarity of image and caption by CLIP, at least 0; higher is better",
    "law": "fraction of lanes whose disc keeps color and speed, is reflected by the walls and seen in front of them",
    "law_occluded": "the same of lanes with an occluded event: a disc is seen, hidden and seen again",
    "class_accuracy": "fraction of clips whose top disc has the color of the class throughout",
    "step_error": "mean distance of movements between frames from the nearest path's, px/frame; lower is better",
    "speed_distance": "Wasserstein distance of the speeds between frames from real clips', px/frame; lower is better",
    "invalid": "fraction of images that cannot be from the data set, by the oracle",
}
