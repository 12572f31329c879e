"""Out of PyTorch: a model with its schedule as an ONNX file. (`torch.export` takes the models as they are.)"""

from dtbert.export.onnx_file import Exported, check_onnx_path, export_onnx

__all__ = ["Exported", "check_onnx_path", "export_onnx"]
