/** The card that follows the pointer: what stands under it, in numbers. */
import { fill, h } from './dom'
import { bytes, count, human, number, shape, share } from './format'
import type { State } from './state'

const card = h('div', { class: 'tip', role: 'status', 'aria-live': 'polite', hidden: true })
document.body.append(card)

export function hideTip(): void {
  card.hidden = true
}

function place(x: number, y: number): void {
  card.hidden = false
  const { width, height } = card.getBoundingClientRect()
  const left = x + 18 + width > innerWidth ? x - width - 14 : x + 18
  const top = y + 18 + height > innerHeight ? y - height - 10 : y + 18
  card.style.left = `${Math.max(6, left)}px`
  card.style.top = `${Math.max(6, top)}px`
}

/** A card of one tensor. */
export function tensorTip(state: State, row: number, x: number, y: number, more: HTMLElement | null = null): void {
  const { model } = state
  const { a } = model
  const facts: [string, string][] = []
  const fact = (label: string, value: string) => facts.push([label, value])
  fact(state.statistic.label, state.statistic.format(state.statistic.value(row)))
  if (model.over) fact('step', count(model.over.step))
  if (a.read(row)) {
    const values = a.get('values')[row]
    const shown = state.statistic.key
    if (shown !== 'mean') fact('mean', number(a.get('mean')[row]))
    if (shown !== 'std') fact('std', number(a.get('std')[row]))
    fact('min … max', `${number(a.get('min')[row])} … ${number(a.get('max')[row])}`)
    const zeros = a.get('zeros')[row]
    if (zeros && shown !== 'zeros') fact('zeros', share(zeros / values))
    const odd = a.get('nan')[row] + a.get('posinf')[row] + a.get('neginf')[row]
    if (odd) fact('NaN, ±Inf', count(odd))
  }
  const reason = model.unread(row)
  fill(
    card,
    h('div', { class: 'tip-name' }, model.names[row]),
    h(
      'div',
      { class: 'tip-type' },
      `${shape(model.shapeOf(row))} · ${model.typeOf(row)} · ${human(model.numel[row])} · ${bytes(model.nbytes[row])}`,
    ),
    factList(facts),
    reason ? h('div', { class: 'tip-note' }, `not read: ${reason}`) : null,
    ...(model.flagged.get(row) ?? []).slice(0, 3).map(([finding, text, step]) =>
      h('div', { class: `tip-finding ${finding.severity}` }, step === undefined ? null : `step ${count(step)}: `, text || finding.title),
    ),
    more,
  )
  place(x, y)
}

/** A card of several tensors together. */
export function groupTip(title: string, lines: string[], facts: [string, string][], x: number, y: number): void {
  fill(
    card,
    h('div', { class: 'tip-name' }, title),
    ...lines.map((line) => h('div', { class: 'tip-type' }, line)),
    factList(facts),
  )
  place(x, y)
}

function factList(facts: [string, string][]): HTMLElement {
  return h('dl', { class: 'facts' }, ...facts.flatMap(([label, value]) => [h('dt', {}, label), h('dd', {}, value)]))
}
