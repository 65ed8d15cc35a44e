"""The compiler half: refuses all targets."""

from triton.backends.compiler import BaseBackend, GPUTarget


class InterpretedBackend(BaseBackend):
    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return False

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict) -> object:
        raise NotImplementedError("kernels run interpreted")

    def add_stages(self, stages, options, language) -> None:
        raise NotImplementedError("kernels run interpreted")

    def load_dialects(self, context) -> None:
        raise NotImplementedError("kernels run interpreted")

    def get_module_map(self) -> dict:
        return {}
