// The op that says what these sources take for the contract (contract.h): a line "name value" for each entry of
// lookbehind_fused/kernels/contract.py.
#include "contract.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace lookbehind_fused {
namespace {

constexpr struct {
  const char* name;
  int64_t value;
} kEntries[] = {
    {"Flag.ADAPTIVE", kAdaptive},
    {"Flag.PER_TENSOR", kPerTensor},
    {"Flag.MAXIMIZE", kMaximize},
    {"Flag.NESTEROV", kNesterov},
    {"Flag.DECOUPLED", kDecoupled},
    {"Flag.DERIVES", kDerives},
    {"Flag.SKIPS", kSkips},
    {"RuleId.NONE", int64_t(Rule::none)},
    {"RuleId.SGD", int64_t(Rule::sgd)},
    {"RuleId.MOMENTUM", int64_t(Rule::momentum)},
    {"RuleId.ADAM", int64_t(Rule::adam)},
    {"RuleId.AMSGRAD", int64_t(Rule::amsgrad)},
    {"Hyper.RHO", kRho},
    {"Hyper.ETA", kEta},
    {"Hyper.ALPHA", kAlpha},
    {"Hyper.MAX_GRAD_NORM", kMaxGradNorm},
    {"Hyper.UNSCALE", kUnscale},
    {"Hyper.OF_RULE", kOfRule},
    {"Column.ROW", kRow},
    {"Column.START", kStart},
    {"Column.SIZE", kSize},
    {"Column.GROUP", kGroup},
    {"Column.ADDRESS", kAddress},
    {"Column.SIZES", kSizes},
    {"INLINED", kInlined},
};

std::string contract() {
  std::string lines;
  const auto add = [&](const std::string& name, int64_t value) { lines += name + " " + std::to_string(value) + "\n"; };
  for (const auto& entry : kEntries) add(entry.name, entry.value);
  const char* rules[kRules] = {"NONE", "SGD", "MOMENTUM", "ADAM", "AMSGRAD"};
  for (int r = 0; r < kRules; ++r) {
    const std::string rule = rules[r];
    add(rule + ": buffers", kExtents[r].buffers), add(rule + ": numbers", kExtents[r].numbers);
    if (Rule(r) == Rule::sgd || Rule(r) == Rule::momentum) {
      add(rule + ".lr", kSgdLr), add(rule + ".momentum", kSgdMomentum);
      add(rule + ".dampening", kSgdDampening), add(rule + ".weight_decay", kSgdWeightDecay);
    }
    if (Rule(r) == Rule::adam || Rule(r) == Rule::amsgrad) {
      add(rule + ".lr", kAdamLr), add(rule + ".beta1", kAdamBeta1), add(rule + ".beta2", kAdamBeta2);
      add(rule + ".eps", kAdamEps), add(rule + ".weight_decay", kAdamWeightDecay);
    }
  }
  return lines;
}

}  // namespace
}  // namespace lookbehind_fused

STABLE_TORCH_LIBRARY_IMPL(lookbehind_fused, CompositeExplicitAutograd, m) {
  m.impl("contract", TORCH_BOX(&lookbehind_fused::contract));
}
