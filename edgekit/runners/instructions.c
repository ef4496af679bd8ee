/*
 * A plugin of QEMU's code generator that counts the instructions of a program with one thread.
 *
 * QEMU's header is not in every package of QEMU, so what is used of it is declared here: qemu/qemu-plugin.h, the part that
 * is the same in the interface's versions 1 (QEMU 6.0 to 8.2) to 5. API is the version to be announced.
 */
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define EXPORT __attribute__((visibility("default")))

struct qemu_plugin_tb;
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };

extern void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*)(uint64_t id, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned cpu, void *data),
                                                 enum qemu_plugin_cb_flags, void *data);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_atexit_cb(uint64_t id, void (*)(uint64_t id, void *data), void *data);
extern void qemu_plugin_outs(const char *);

EXPORT int qemu_plugin_version = API;

static uint64_t instructions;

static void executed(unsigned cpu, void *data)
{
    (void)cpu;
    instructions += (uintptr_t)data;
}

static void translated(uint64_t id, struct qemu_plugin_tb *block)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_cb(block, executed, QEMU_PLUGIN_CB_NO_REGS, (void *)qemu_plugin_tb_n_insns(block));
}

static void ended(uint64_t id, void *data)
{
    (void)id, (void)data;
    char line[64];
    snprintf(line, sizeof line, "edgekit-instructions %" PRIu64 "\n", instructions);
    qemu_plugin_outs(line);
}

EXPORT int qemu_plugin_install(uint64_t id, const void *info, int count, char **arguments)
{
    (void)info, (void)count, (void)arguments;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
