"""What an option can name, and what it stands at where nothing is given: apart from what is behind the names,
so that the command line can say its help without PyTorch."""

FASHION_DEIT = "fashion-deit"  # the model that ships with the package, and its data
EMBEDDED = "fashion-mnist-10k"

SCORES = ("gate", "taylor", "obs", "activation", "variance")
SCOPES = ("global", "per_site", "per_layer")  # in which one ranking is cut
CALIBRATION_IMAGES = 2048

NEIGHBOURS = 20  # of k-NN

TIMED_DTYPES = ("float32", "bfloat16")

TARGETS = ("onnx", "openvino", "pt2", "executorch")  # of an export
EXPORTED_DTYPES = ("float32", "float16", "bfloat16")
OPSET = 23  # of ONNX
OPSETS = range(18, 24)  # from the first that PyTorch's exporter writes
