/** The slider over the steps of a training: it has the keys of the browser's own. */
import { choice, fill, h } from '../dom'
import { count } from '../format'
import type { State } from '../state'

export function overSteps(state: State, root: HTMLElement): void {
  const { over } = state.model
  if (!over || over.steps.length < 2) return
  const last = over.steps.length - 1
  let wanted = over.at
  let waiting = false
  const slider = h('input', {
    type: 'range', id: 'step', min: 0, max: last, step: 1, 'aria-label': 'Step',
    input: () => {
      wanted = Number(slider.value)
      if (waiting) return
      // What is drawn is the place of the slider when the browser draws, not each that it passed.
      waiting = true
      requestAnimationFrame(() => {
        waiting = false
        state.go(wanted)
      })
    },
  })
  const said = h('output', { for: 'step', class: 'said' })
  const move = (label: string, text: string, by: number) =>
    h('button', { type: 'button', 'aria-label': label, title: label, click: () => state.go(over.at + by) }, text)
  const range = choice('Colours over the steps', [['all', 'all steps'], ['one', 'this step']], 'all', (value) => {
    state.allSteps = value === 'all'
    state.emit('statistic')
  })
  const show = () => {
    wanted = over.at
    slider.value = String(over.at)
    slider.setAttribute('aria-valuetext', `step ${count(over.step)}`)
    fill(said, `step ${count(over.step)} · ${count(over.at + 1)} of ${count(last + 1)}`)
  }
  root.hidden = false
  fill(root, h('label', { for: 'step' }, 'Step'), move('Previous step', '‹', -1), slider, move('Next step', '›', 1), said, h('span', { class: 'field' }, 'Colours over ', range))
  show()
  state.listen((change) => change === 'step' && show())
}
