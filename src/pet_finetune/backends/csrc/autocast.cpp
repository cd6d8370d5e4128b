// The operators within torch's autocast: as those of torch that need their digits (its layer_norm,
// say), they compute in float32 and not in autocast's type. Who wants the products themselves in
// fewer digits chooses a back end that rounds them.

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace pet {
namespace {

// Casts what comes in fewer digits, but for weights that were packed so, and goes on.
void in_float32(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    if (arguments[i].name().find("packed") != std::string::npos) continue;
    const auto type = value.toTensor().scalar_type();
    if (type == at::kBFloat16 || type == at::kHalf) value = value.toTensor().to(at::kFloat);
  }
  op.callBoxed(stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(pet_finetune, AutocastCPU, m) {
  for (const char* name : {"norm", "gate", "projection", "grouped_projection", "attention",
                           "attention_layer", "two_layers"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&in_float32>());
}

}  // namespace pet
